"""The demo application. It will import `redif_sdk` only; this release has none yet."""
