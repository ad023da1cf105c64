"""How far a load is and how long it still takes, from what the engine prints and from earlier loads."""
