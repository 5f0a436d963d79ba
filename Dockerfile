# A CPU image by default; --build-arg TORCH=cuda takes PyTorch's CUDA build, for `docker run --gpus all`.
FROM python:3.12-slim
ARG TORCH=cpu
ENV PIP_NO_CACHE_DIR=1 LORA_GPT2_STORE=/adapters LORA_GPT2_CACHE=/cache
WORKDIR /opt/lora-gpt2
COPY pyproject.toml constraints.txt README.md LICENSE CHANGELOG.md ./
COPY recipes recipes
COPY lora_gpt2 lora_gpt2
RUN if [ "$TORCH" = cpu ]; then INDEX="--extra-index-url https://download.pytorch.org/whl/cpu"; fi \
    && pip install $INDEX --constraint constraints.txt ".[serve,documents]"
RUN useradd --create-home --uid 1000 writer && mkdir -p /adapters /cache /records && chown writer /adapters /cache /records
USER writer
WORKDIR /work
VOLUME ["/adapters", "/cache"]
EXPOSE 8000
ENTRYPOINT ["lora-gpt2"]
CMD ["--help"]
