"""Students on the Hugging Face Hub: `Remote` and `pull` get them, `push` puts them there, `push_space` shows one.

`target.py` is a repository that is sent to; `client.py` holds what all share: names, the client, and what its errors
mean. huggingface_hub is imported when it is first needed. What a student's files mean is `manifest.py`'s business, and
whether they are harmless `folder.py`'s.
"""

from __future__ import annotations

from redif_sdk.hub.client import check_local, is_hub_id
from redif_sdk.hub.pull import Origin, Remote, fetch, pull
from redif_sdk.hub.push import push
from redif_sdk.hub.space import push_space
from redif_sdk.hub.target import Pushed

__all__ = ["Origin", "Pushed", "Remote", "check_local", "fetch", "is_hub_id", "pull", "push", "push_space"]
