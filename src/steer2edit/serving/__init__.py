"""One loaded model for many: an OpenAI-compatible server, and a chat in the terminal or in the browser."""
