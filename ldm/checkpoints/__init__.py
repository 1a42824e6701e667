"""Files <-> models. native.py is our own format; original.py and diffusers.py are the only home of foreign names.

    path -> opening.open_checkpoint -> Checkpoint -> networks.fill -> a network
                                       Checkpoint -> native.save, export.write -> another file

reading.py alone opens weight files: nothing in them is executed, no tensor is read before it is asked for.
"""
