"""Comparison with llama.cpp. Each side is a process of its own, so that both stay loaded and take turns."""
