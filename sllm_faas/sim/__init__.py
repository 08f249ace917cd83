"""The platform on a virtual clock: the production controller and queues, modelled nodes, generated or recorded load.

    Scenario ──► Simulation ── handle(event, now) ──► Machine (controller.state)
                   │  gateway: dispatch.queue, dispatch.slots
                   └─ nodes: tiers with a bandwidth each, slots, accelerators, memory

What is modelled: reading, starting, serving, moving, messages' delay. What is not: everything that decides. Two runs of
one scenario and seed give the same events in the same order.
"""
