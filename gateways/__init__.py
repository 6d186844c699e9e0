"""Gateways: what joins the broker to other systems. Each is a package with `build`."""
