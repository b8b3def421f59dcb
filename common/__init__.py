"""What gateway and worker both stand on. Imports neither."""
