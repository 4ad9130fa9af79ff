"""Patches and maps on the Hub: what is pushed, what is fetched, what is found, and its card.

Here live a repo's layout, the checks before anything is sent, and the card made of results. Making
results, and loading models, do not. ``docs/hub.md`` is for people.
"""
