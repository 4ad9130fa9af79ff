"""What needs both an adapter and a checkpoint, straight from disk to disk: numpy, no transformers.

``fit`` finds an adapter's entries in a checkpoint, ``patches`` and ``edits`` are what is merged,
``entries`` tells what they are once merged, ``merging`` writes them as a new checkpoint (``card``
is its card), ``in_place`` into the same one (``undo`` is its journal), ``planning`` foretells both,
``protecting`` puts a base's entries back into a tuned model, ``differing`` makes a patch of two
checkpoints, ``exporting`` one for other programs, ``converting`` writes one in another encoding,
``verifying`` checks adapters, bases and merged models (``comparing`` these). Merging inside a
loaded model is PEFT's: see ``tuner``.
"""
