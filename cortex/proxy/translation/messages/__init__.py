"""Anthropic's Messages API on an engine that has only `/v1/chat/completions`. Pure."""
