"""The proving machine: every part of ChatRail under load, faults by a schedule, and a checker that counts afterwards.

`make faults SEED=7 MINUTES=5`, or `python -m tests.faults.machine --seed 7 --minutes 5`. Read it in this order:

- schedule.py: the seed alone decides which parts there are, and which fault happens to which of them when
- system.py: the parts, with a proxy on every link (tests/proxy.py), and what an operator can do to them
- parts.py: a process that is started again when it ends
- load.py: people and back ends over chat's HTTP API
- run.py: load and faults, and then a while in which all of it must come right again; leaves a log of operations
- evidence.py: reads that log, what the stand-in gave, the stream and the databases
- checker.py: says what is lost, doubled or wrong; pure, and a process of its own
"""
