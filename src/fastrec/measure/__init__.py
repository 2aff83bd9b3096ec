"""Timing, contests between engines, machine limits, the machine card, memory of a process."""
