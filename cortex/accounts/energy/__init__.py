"""What the engines' energy was used for: the meters of the neurons, and the requests that ran meanwhile."""
