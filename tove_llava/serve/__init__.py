"""The demo's page, the OpenAI endpoint, and the terminal chat's commands."""
