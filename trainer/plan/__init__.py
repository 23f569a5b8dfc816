"""Parameters, memory and step time of a configuration by arithmetic, from rates measured once. Imports no torch."""
