# vmctr: what can be made. The work is done by cargo and by scripts/.

PREFIX ?= /usr/local
DESTDIR ?=

# Where rustup puts cargo, for machines that have it from there.
export PATH := $(HOME)/.cargo/bin:$(PATH)

bin := $(DESTDIR)$(PREFIX)/bin
libexec := $(DESTDIR)$(PREFIX)/libexec/vmctr
# mount(8) looks for its helpers there and nowhere else.
sbin := $(DESTDIR)/sbin
guest := $(DESTDIR)$(PREFIX)/share/vmctr/guest
units := $(DESTDIR)$(PREFIX)/lib/systemd/system

bin_programs := vmctr containerd-shim-vmctr-v2
libexec_programs := vmctr-fsd vmctr-jail
guest_files := vmlinux initramfs.cpio manifest.json
unit := vmctr-pool.service

.PHONY: help build demo test bench install uninstall clean

help: ## Show this list
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

build: ## Build the programs (target/release) and what VMs boot (target/guest)
	scripts/build

demo: ## Install what is missing, build, run a Debian container behind its own kernel (as root)
	scripts/setup
	scripts/build
	scripts/demo

test: ## Install what is missing, then check everything (as root)
	scripts/test

bench: ## Measure starts, streams, files and memory, under vmctr and under runc (as root)
	scripts/bench

install: ## Install what `make build` made to $(DESTDIR)$(PREFIX)
	install -d $(bin) $(libexec) $(guest) $(sbin) $(units)
	install -m 755 $(addprefix target/release/,$(bin_programs)) $(bin)
	install -m 755 $(addprefix target/release/,$(libexec_programs)) $(libexec)
	ln -sfn $(PREFIX)/bin/vmctr $(sbin)/mount.fuse.vmctr
	install -m 644 $(addprefix target/guest/,$(guest_files)) $(guest)
	sed 's|/usr/local/bin|$(PREFIX)/bin|' packaging/$(unit) > $(units)/$(unit)
	chmod 644 $(units)/$(unit)

uninstall: ## Remove what `make install` installed
	rm -f $(addprefix $(bin)/,$(bin_programs)) $(sbin)/mount.fuse.vmctr $(units)/$(unit)
	rm -rf $(libexec) $(DESTDIR)$(PREFIX)/share/vmctr

clean: ## Remove what was built; downloads stay in the cache
	cargo clean
