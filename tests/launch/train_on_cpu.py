"""`python -m rltoken.train` where processes on CPUs pass for such with a GPU each: started by test_runs.py."""

from rltoken import train
from tests.trl.on_cpu import stand_in

if __name__ == "__main__":
    stand_in()
    train.main()
