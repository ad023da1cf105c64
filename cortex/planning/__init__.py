"""Where models go, what makes way for them, and when. Pure: an immutable view in, plans and steps out."""
