"""Routes: who is asking, and making, changing and deleting repositories."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .calls import API, LOGIN, Answer, Call, Refused, json_answer, kind_prefix, route
from .cards import check_card

if TYPE_CHECKING:
    from .standin import HubStandIn


@route("GET", "/api/whoami-v2")
def whoami(hub: HubStandIn, call: Call) -> Answer:
    if call.user is None:
        raise Refused(401, LOGIN)
    orgs = [{"type": "org", "name": name} for name, members in hub.orgs.items() if call.user in members]
    role = "write" if call.may_write else "read"
    token = {"type": "access_token", "accessToken": {"displayName": "test", "role": role}}
    return json_answer({"type": "user", "id": call.user, "name": call.user, "orgs": orgs, "auth": token})


@route("GET", "/api/agent-harnesses")
def agent_harnesses(hub: HubStandIn, call: Call) -> Answer:
    return json_answer({"standardEnvVars": [], "harnesses": {}})


@route("POST", "/api/repos/create")
def create_repo(hub: HubStandIn, call: Call) -> Answer:
    asked = call.json()
    if call.user is None:
        raise Refused(401, LOGIN)
    namespace = asked.get("organization") or call.user
    name = f"{namespace}/{asked['name']}"
    kind = asked.get("type") or "model"
    if not hub.writes(call, namespace):
        raise Refused(403, f'You don\'t have the rights to create a {kind} under the namespace "{namespace}"')
    url = f"{hub.url}/{kind_prefix(kind)}{name}"
    if (kind, name) in hub.repos:
        raise Refused(409, f"You already created this {kind} repo", url=url)
    if kind == "space" and asked.get("sdk") not in ("gradio", "static", "docker", "streamlit"):
        raise Refused(400, '"sdk" is required for a Space')
    private = asked.get("private") or asked.get("visibility") == "private"
    hub.new_repo(name, kind, private=bool(private))
    if kind == "space":
        hub.put(name, {"README.md": f"---\ntitle: {asked['name']}\nsdk: {asked['sdk']}\n---\n".encode()}, kind=kind)
    return json_answer({"url": url, "name": name, "id": name})


@route("DELETE", "/api/repos/delete")
def delete_repo(hub: HubStandIn, call: Call) -> Answer:
    asked = call.json()
    name = f"{asked.get('organization') or call.user}/{asked['name']}"
    repo = hub.visible(call, asked.get("type") or "model", name, write=True)
    del hub.repos[repo.kind, repo.name]
    return json_answer({})


@route("PUT", API + "/settings")
def settings(hub: HubStandIn, call: Call) -> Answer:
    repo = hub.visible(call, write=True)
    asked = call.json()
    if "visibility" in asked or "private" in asked:
        repo.private = asked.get("visibility") == "private" or bool(asked.get("private"))
    if "gated" in asked:
        repo.gated = asked["gated"]
    return json_answer({"private": repo.private, "gated": repo.gated})


@route("POST", "/api/validate-yaml")
def validate_yaml(hub: HubStandIn, call: Call) -> Answer:
    errors, warnings = check_card(call.json().get("content", ""))
    found = {"errors": [{"message": text} for text in errors], "warnings": [{"message": text} for text in warnings]}
    if errors:
        return json_answer({"error": "Invalid metadata in README.md", **found}, 400)
    return json_answer(found)
