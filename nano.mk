# Trains `nano` from nothing: `make nano` in full, `make nano-short` each stage for a few steps.
# A stage that is interrupted continues where it was when make runs again; docs/nano.md explains.
# All paths are below DIRECTORY, because the recipes name `runs/nano`.
DIRECTORY ?= .
LWM := $(abspath $(BIN))/lwm
N := $(DIRECTORY)/runs/nano
RUN = cd $(DIRECTORY) && $(LWM)
WORLD = $(RUN) data world
SEEDS ?= 1 2 3
PICTURES ?= 20000
SHORT_TEXTS ?= 40000
TEXTS ?= 1500
LONG_TEXTS ?= 300
LONGEST_TEXTS ?= 100
IMAGES ?= 40000
VIDEOS ?= 7000
LONG_VIDEOS ?= 400
STEPS ?=

.PHONY: nano nano-short
nano: $(N)/chat.done

nano-short: .venv/installed-dev
	rm -rf runs/nano-short && mkdir -p runs/nano-short
	$(MAKE) nano DIRECTORY=runs/nano-short SEEDS=1 PICTURES=200 SHORT_TEXTS=200 TEXTS=20 LONG_TEXTS=4 LONGEST_TEXTS=4 \
		IMAGES=200 VIDEOS=50 LONG_VIDEOS=20 STEPS="--steps 2"

$(N): .venv/installed-dev
	mkdir -p $@

$(N)/pictures: | $(N)
	$(WORLD) pictures runs/nano/pictures --count $(PICTURES)

$(N)/tokenizer: | $(N)
	$(WORLD) tokenizer runs/nano/tokenizer

text = $(WORLD) $(firstword $(subst -, ,$(@F))) runs/nano/$(@F) \
	--tokenizer runs/nano/tokenizer --length $(1) --count $(2)

$(N)/lists-96.jsonl: $(N)/tokenizer
	$(call text,96,$(SHORT_TEXTS))

$(N)/texts-256.jsonl: $(N)/tokenizer
	$(call text,256,$(SHORT_TEXTS))

$(N)/texts-2k.jsonl: $(N)/tokenizer
	$(call text,2048,$(TEXTS))

$(N)/texts-8k.jsonl: $(N)/tokenizer
	$(call text,8192,$(LONG_TEXTS))

$(N)/texts-16k.jsonl: $(N)/tokenizer
	$(call text,16384,$(LONGEST_TEXTS))

$(N)/texts-32k.jsonl: $(N)/tokenizer
	$(call text,32768,$(LONGEST_TEXTS))

$(N)/images-%.jsonl: $(N)/vqgan.done
	$(WORLD) images runs/nano/$(@F) --vqgan runs/nano/vqgan --count $(IMAGES) --seed $*

$(N)/videos-%.jsonl: $(N)/vqgan.done
	$(WORLD) videos runs/nano/$(@F) --vqgan runs/nano/vqgan --count $(VIDEOS) --seed $*

$(N)/long-videos-%.jsonl: $(N)/vqgan.done
	$(WORLD) long-videos runs/nano/$(@F) --vqgan runs/nano/vqgan --count $(LONG_VIDEOS) --seed $*

IMAGE_FILES := $(SEEDS:%=$(N)/images-%.jsonl)
VIDEO_FILES := $(SEEDS:%=$(N)/videos-%.jsonl)
LONG_VIDEO_FILES := $(SEEDS:%=$(N)/long-videos-%.jsonl)

# Training: a stage is its recipe's name, and is done when its last step is saved.
train = $(RUN) train nano-$(*F) --out runs/nano/$(*F) $(STEPS) && touch $(abspath $@)

$(N)/vqgan.done: $(N)/pictures
$(N)/lists.done: $(N)/lists-96.jsonl
$(N)/text.done: $(N)/lists.done $(N)/texts-256.jsonl
$(N)/text-2k.done: $(N)/text.done $(N)/texts-2k.jsonl
$(N)/text-8k.done: $(N)/text-2k.done $(N)/texts-8k.jsonl
$(N)/text-32k.done: $(N)/text-8k.done $(N)/texts-32k.jsonl
$(N)/images.done: $(N)/text-vision $(N)/texts-256.jsonl $(IMAGE_FILES)
$(N)/videos.done: $(N)/images.done $(N)/texts-2k.jsonl $(VIDEO_FILES)
$(N)/chat.done: $(N)/videos.done $(N)/texts-16k.jsonl $(LONG_VIDEO_FILES)

$(N)/%.done:
	$(train)

$(N)/text-vision: $(N)/text-32k.done $(N)/vqgan.done
	$(RUN) convert runs/nano/text-32k runs/nano/text-vision --add-vision --vqgan runs/nano/vqgan
