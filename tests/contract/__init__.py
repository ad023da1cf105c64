"""Rules for the whole project: documents, examples, boundaries, routes, language."""
