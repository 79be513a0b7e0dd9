"""Students on the Hugging Face Hub: `Remote` and `pull` download them, `push` uploads one, `push_space` makes a demo.

`target.py` is the repository of an upload; `client.py` holds what all share: names, the client, and its errors.
huggingface_hub is imported at first use, which keeps the import of redif-sdk fast.
"""

from __future__ import annotations

from redif_sdk.hub.client import check_local, is_hub_id
from redif_sdk.hub.pull import Origin, Remote, fetch, pull
from redif_sdk.hub.push import push
from redif_sdk.hub.space import push_space
from redif_sdk.hub.target import Pushed

__all__ = ["Origin", "Pushed", "Remote", "check_local", "fetch", "is_hub_id", "pull", "push", "push_space"]
