# The demo in a container: docker build -t flowdistill . && docker run --rm flowdistill
# Other commands: docker run --rm --entrypoint .venv/bin/flowdistill flowdistill methods
FROM python:3.12-slim-bookworm

RUN apt-get update \
    && apt-get install --no-install-recommends --yes make \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home distiller \
    && install --directory --owner distiller /home/distiller/flowdistill

WORKDIR /home/distiller/flowdistill
COPY --chown=distiller . .

USER distiller
RUN make .venv/installed

ENTRYPOINT ["make"]
CMD ["demo"]
