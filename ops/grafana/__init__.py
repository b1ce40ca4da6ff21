"""Grafana: the operator dashboard, the code that generates it, and how Grafana finds both it and Prometheus."""
