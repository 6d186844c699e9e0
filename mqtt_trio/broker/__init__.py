"""The broker without I/O: sessions, subscriptions, routing. Time arrives as `now`, bytes leave through outboxes."""
