"""What a reward over HTTP is asked and answers, as JSON. The schema is in ``docs/schema/reward.json``."""

from __future__ import annotations

import json
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

__all__ = ["RewardAnswer", "RewardRequest", "schema"]

Number = float | None


class RewardRequest(BaseModel):
    """POST: N images to judge, and what they were to be. Each list has N entries, or is null."""

    model_config = ConfigDict(extra="ignore", json_schema_extra={"title": "RewardRequest"})

    images: list[str] = Field(min_length=1, description="PNG files in base64.")
    targets: list[str] | None = Field(None, description="The teacher's images of the same noises, PNG in base64.")
    prompts: list[str] | None = Field(None, description="The prompt of each image.")
    class_labels: list[int] | None = Field(None, description="The class of each image.")
    class_names: list[str] | None = Field(None, description="The name of each image's class.")

    conditions: dict[str, list[Any]] | None = Field(
        None,
        description="The arrays that each image is conditioned on, by name: PNG in base64 for images, else numbers, or "
        "lists of numbers. Large arrays that are no images are left out.",
    )

    @model_validator(mode="after")
    def _alike(self) -> RewardRequest:
        lists = {name: getattr(self, name) for name in ("targets", "prompts", "class_labels", "class_names")}
        for name, given in [*lists.items(), *(self.conditions or {}).items()]:
            if given is not None and len(given) != len(self.images):
                raise ValueError(f"{name} has {len(given)} entries, images {len(self.images)}")
        return self


class RewardAnswer(BaseModel):
    """200: a number an image, higher is better; null or NaN: it could not be judged. One score, or several by name."""

    model_config = ConfigDict(extra="ignore", strict=True)

    rewards: list[Number] | None = Field(None, description="One number an image.")
    scores: dict[str, list[Number]] | None = Field(
        None, description="Several scores, each with one number an image; each is normalised over its group by itself."
    )

    @model_validator(mode="after")
    def _one_of_both(self) -> RewardAnswer:
        if (self.rewards is None) == (not self.scores):
            raise ValueError("give rewards, or scores, and not both")
        return self

    def by_name(self) -> dict[str, list[Number]]:
        """The scores by name; of one score without a name, under the empty name."""
        return {"": self.rewards} if self.rewards is not None else dict(self.scores or {})


def schema() -> dict[str, Any]:
    """The JSON Schema of both."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "A reward over HTTP",
        "request": RewardRequest.model_json_schema(),
        "answer": RewardAnswer.model_json_schema(mode="serialization"),
    }


if __name__ == "__main__":
    print(json.dumps(schema(), indent=1))
