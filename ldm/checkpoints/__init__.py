"""Files <-> models. native.py is our own format; original.py and diffusers.py are the only home of foreign names.

    name -> opening.open_checkpoint -> Checkpoint.load -> a network
                                       Checkpoint.state -> native.save, export.write -> another file

reading.py alone opens weight files: nothing in them is executed, no tensor is read before it is asked for.
"""
