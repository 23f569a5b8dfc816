"""YAML recipes shipped as package data; nothing imports from here."""
