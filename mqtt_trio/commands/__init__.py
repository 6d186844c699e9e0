"""What `mqtt-trio` does beyond `serve` and `check`. Each command is imported only when it runs."""
