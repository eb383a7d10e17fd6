"""A training stack that turns a Qwen2.5 checkpoint into a domain reasoning model."""
