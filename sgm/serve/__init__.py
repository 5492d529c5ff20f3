"""A page and OpenAI's video API over one queue of jobs: `python -m sgm.serve [CONFIG.yaml ...]`.

`store` keeps the jobs, `worker` makes their clips in a process of its own for each GPU, `supervisor` keeps the workers
alive, `desk` takes requests, for clients by `rest` and for people by `page`. What this package needs beyond the rest of
the project is listed in `requirements.txt` beside this file.
"""
