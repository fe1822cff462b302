"""The proving machine: every part of ChatRail under load, faults by a schedule, and a checker that counts afterwards.

python -m tests.faults.machine --seed 7 --minutes 5        or: make faults SEED=7 MINUTES=5

schedule.py   the seed alone decides which parts there are, and which fault happens to which of them when
parts.py      the processes, each started again when it ends
link.py       the proxy on every link: it passes, cuts, swallows or slows
load.py       people and back ends over chat's HTTP API
run.py        puts them together, and leaves a log of operations (NDJSON)
evidence.py   reads that log, what the stand-in gave, the stream and the databases
checker.py    says what is lost, doubled or wrong; pure, and a process of its own when the machine runs it
"""
