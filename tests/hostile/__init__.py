"""Files from strangers, through every way in which an adapter can be read."""
