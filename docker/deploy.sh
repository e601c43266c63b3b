#!/bin/sh
# Work pools with their limits, then every deployment of prefect.yaml. Changes nothing when repeated.
set -eu
prefect --no-prompt work-pool create cpu --type process --base-job-template flows/server/pool.json --overwrite
prefect --no-prompt work-pool create gpu --type process --base-job-template flows/server/pool.json --overwrite
prefect --no-prompt work-pool set-concurrency-limit cpu "$CPU_POOL_LIMIT"
prefect --no-prompt work-pool set-concurrency-limit gpu "$GPU_POOL_LIMIT"
python -c 'import os; from flows.server.services import deploy; deploy(os.environ["PREFECT_API_URL"], os.environ)'
