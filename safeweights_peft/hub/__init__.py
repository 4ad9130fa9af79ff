"""Patches and maps on the Hub: what is pushed, what is fetched, what is found, and its card.

Here live a repo's layout, the checks before anything is sent, and the card made of results. Making
results, and loading models, do not. ``docs/hub.md`` is for people.
"""

from safeweights_peft.hub.listing import Claim, Shared, find_on_hub
from safeweights_peft.hub.pulling import Pulled, fetch_adapter, is_hub_id, pull_from_hub
from safeweights_peft.hub.pushing import Pushed, push_to_hub

__all__ = [
    "Claim",
    "Pulled",
    "Pushed",
    "Shared",
    "fetch_adapter",
    "find_on_hub",
    "is_hub_id",
    "pull_from_hub",
    "push_to_hub",
]
