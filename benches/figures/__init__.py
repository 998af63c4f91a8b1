"""What the yardstick measures, a module a figure: each has ``measure(say) -> list[Row]`` and a first line that says what it is."""
