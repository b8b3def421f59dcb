"""Callbacks: claim what is due, send it, record how it went."""
