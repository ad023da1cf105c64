"""Real clients against a fleet of real processes: one file a client, cold and warm, streamed and not. docs/clients.md
says what each needs."""
