"""For `torchrun -m parallel_parnet.commands.infer`."""

from parallel_parnet.commands import start

if __name__ == "__main__":
    start("infer")
