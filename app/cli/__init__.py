"""The commands of entrypoint.py: each reads like the flow it is, and imports what it needs when it runs."""
