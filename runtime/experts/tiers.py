"""Where experts that do not all fit the device lie: three tiers, each larger and slower than the one before.

- A **slot** is device memory. Only there the device computes an expert.
- A **berth** is a piece of host memory, in the arena. An expert without a slot is copied from its berth.
- The **file** is the native checkpoint's. It has every expert for good, so one that has neither slot nor
  berth is read again.

If there are berths for all experts, each has its own for good, and the files are closed after loading.
Otherwise an expert that leaves its slot is written back to a berth, and one that comes is read into a berth
on its way to a slot.
"""

SPARE_BERTHS = 2  # the least: one that an expert comes through, and one that another leaves to
SPARE_SLOTS = 2  # of no layer: experts leave through them, so no miss waits until one has been written back
