"""Archive groups: which messages are kept, and where."""
