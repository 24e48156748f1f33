"""The plugin on a machine with an NVIDIA GPU and without a network.

Here, where the repository and a network are (it compiles the CUDA backend, see CONTRIBUTING.md)::

    python -m bench.device.prepare      # makes build/ds4-device.tar.xz, less than 60 MB

There: Linux on x86-64, an NVIDIA driver and the libraries of CUDA 13, Python 3.12; again and again until it says that
all is done, for no call takes longer than 10 minutes::

    python3 -m tarfile -e ds4-device.tar.xz ds4 && cd ds4 && python3 -m bench.device.run --out RESULTS

Each step's result is kept in ``RESULTS/results.json``, which a later call goes on from, also on another machine.
``prepare --cpu`` and ``run --cpu --tiny`` do every step in a minute or two where there is no GPU.
"""
