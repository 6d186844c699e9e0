"""The network side: listeners, links, the poller, timers."""
