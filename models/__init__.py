"""The bundled demo model and the script that trains it from public-domain text."""
