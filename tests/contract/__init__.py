"""What the project promises as a whole: documents, examples, boundaries, routes."""
