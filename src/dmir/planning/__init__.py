"""Planning: what a configuration will cost in hours, memory and disk, before anything of it runs.

:func:`~dmir.planning.plan.plan` counts the jobs, measures the device at hand for a minute or two, and scales.
"""
