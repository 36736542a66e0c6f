# Serves the model in the volume /model, and keeps videos in /videos; see docs/serving.md.
FROM python:3.11-slim

# gcc compiles the attention kernel for the machine that the server runs on.
RUN apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /opt/lwm
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY src src
RUN pip install --no-cache-dir --constraint constraints.txt ".[serve]" \
    && useradd --create-home lwm && mkdir /videos && chown lwm /videos
USER lwm
WORKDIR /home/lwm
VOLUME /model /videos
EXPOSE 8000
HEALTHCHECK --start-period=2m CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health')"]
ENTRYPOINT ["lwm", "serve", "/model", "--host", "0.0.0.0", "--videos", "/videos"]
