// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * BPF programs for the lab's guest, which do next to nothing.
 *
 * A benign hook asks the time whenever a program is started (the tracepoint
 * sched_process_exec); or, with the name of an event, whenever perf says that it
 * comes; or whenever a function of the kernel's is called:
 *
 *	bpfprobe [sched/sched_process_exec | kprobes/NAME | fentry FUNCTION]
 *
 * What hosts use BPF for, and is no hook: a policy of the security module, which
 * allows all; a filter of a control group's network, and one of a network
 * interface's, which let everything pass:
 *
 *	bpfprobe lsm bpf_lsm_FUNCTION | cgroup DIRECTORY | xdp INTERFACE-NUMBER
 *
 * It stays for as long as a process does that this one leaves behind.
 *
 *	killall bpfprobe
 */
#include <fcntl.h>
#include <linux/bpf.h>
#include <linux/btf.h>
#include <linux/if_link.h>
#include <linux/perf_event.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <unistd.h>

static int bpf(enum bpf_cmd command, union bpf_attr *attr)
{
	return syscall(SYS_bpf, command, attr, sizeof(*attr));
}

static int load(int type, int attach_type, int function, int result)
{
	const struct bpf_insn program[] = {
		{ .code = BPF_JMP | BPF_CALL, .imm = BPF_FUNC_ktime_get_ns },
		{ .code = BPF_ALU64 | BPF_MOV | BPF_K, .dst_reg = BPF_REG_0, .imm = result },
		{ .code = BPF_JMP | BPF_EXIT },
	};
	static char log[4096];
	union bpf_attr attr;
	int fd;

	memset(&attr, 0, sizeof(attr));
	attr.prog_type = type;
	attr.expected_attach_type = attach_type;
	attr.attach_btf_id = function;
	attr.insns = (uintptr_t)program;
	attr.insn_cnt = sizeof(program) / sizeof(program[0]);
	attr.license = (uintptr_t)"GPL";
	attr.log_buf = (uintptr_t)log;
	attr.log_size = sizeof(log);
	attr.log_level = 1;
	strcpy(attr.prog_name, "lab_probe");
	fd = bpf(BPF_PROG_LOAD, &attr);
	if (fd < 0) {
		perror("bpfprobe: BPF_PROG_LOAD");
		fputs(log, stderr);
	}
	return fd;
}

/* Has perf run a program at an event, on the first CPU. */
static int attach_event(const char *event, int program)
{
	struct perf_event_attr attr;
	char path[128];
	FILE *file;
	int id, fd;

	snprintf(path, sizeof(path), "/sys/kernel/tracing/events/%s/id", event);
	file = fopen(path, "r");
	if (!file || fscanf(file, "%d", &id) != 1)
		return -1;
	fclose(file);
	memset(&attr, 0, sizeof(attr));
	attr.type = PERF_TYPE_TRACEPOINT;
	attr.size = sizeof(attr);
	attr.config = id;
	fd = syscall(SYS_perf_event_open, &attr, -1, 0, -1, 0);
	if (fd < 0)
		return -1;
	return ioctl(fd, PERF_EVENT_IOC_SET_BPF, program);
}

/* At a tracepoint by its name; without one, where the program was loaded for. */
static int attach_raw(const char *tracepoint, int program)
{
	union bpf_attr attr;

	memset(&attr, 0, sizeof(attr));
	attr.raw_tracepoint.name = (uintptr_t)tracepoint;
	attr.raw_tracepoint.prog_fd = program;
	return bpf(BPF_RAW_TRACEPOINT_OPEN, &attr);
}

static int attach_cgroup(const char *directory, int program)
{
	union bpf_attr attr;

	memset(&attr, 0, sizeof(attr));
	attr.target_fd = open(directory, O_RDONLY | O_DIRECTORY);
	attr.attach_bpf_fd = program;
	attr.attach_type = BPF_CGROUP_INET_EGRESS;
	return bpf(BPF_PROG_ATTACH, &attr);
}

static int attach_xdp(const char *interface, int program)
{
	union bpf_attr attr;

	memset(&attr, 0, sizeof(attr));
	attr.link_create.prog_fd = program;
	attr.link_create.target_ifindex = atoi(interface);
	attr.link_create.attach_type = BPF_XDP;
	attr.link_create.flags = XDP_FLAGS_SKB_MODE;
	return bpf(BPF_LINK_CREATE, &attr);
}

/* How long a type is in BTF, behind its head (Documentation/bpf/btf.rst). */
static size_t rest(const struct btf_type *type)
{
	size_t count = BTF_INFO_VLEN(type->info);

	switch (BTF_INFO_KIND(type->info)) {
	case BTF_KIND_INT:
	case BTF_KIND_VAR:
	case BTF_KIND_DECL_TAG:
		return 4;
	case BTF_KIND_ARRAY:
		return sizeof(struct btf_array);
	case BTF_KIND_STRUCT:
	case BTF_KIND_UNION:
	case BTF_KIND_DATASEC:
	case BTF_KIND_ENUM64:
		return 12 * count;
	case BTF_KIND_ENUM:
	case BTF_KIND_FUNC_PROTO:
		return 8 * count;
	default:
		return 0;
	}
}

/* The number that the kernel's BTF has for a function; 0 if there is none. */
static int function_id(const char *name)
{
	static char btf[32 << 20];
	const struct btf_header *head = (const void *)btf;
	const char *at, *end, *strings;
	size_t size = 0;
	ssize_t got;
	int id, fd = open("/sys/kernel/btf/vmlinux", O_RDONLY);

	while (size < sizeof(btf) && (got = read(fd, btf + size, sizeof(btf) - size)) > 0)
		size += got;
	if (size < sizeof(*head))
		return 0;
	at = btf + head->hdr_len + head->type_off;
	end = at + head->type_len;
	strings = btf + head->hdr_len + head->str_off;
	for (id = 1; at < end; id++) {
		const struct btf_type *type = (const void *)at;

		if (BTF_INFO_KIND(type->info) == BTF_KIND_FUNC &&
		    !strcmp(strings + type->name_off, name))
			return id;
		at += sizeof(*type) + rest(type);
	}
	return 0;
}

int main(int argc, char **argv)
{
	const char *what = argc > 1 ? argv[1] : "", *where = argc > 2 ? argv[2] : "";
	int program, attached;

	if (!*what) {
		program = load(BPF_PROG_TYPE_RAW_TRACEPOINT, 0, 0, 0);
		attached = attach_raw("sched_process_exec", program);
	} else if (!strcmp(what, "fentry")) {
		program = load(BPF_PROG_TYPE_TRACING, BPF_TRACE_FENTRY, function_id(where), 0);
		attached = attach_raw(NULL, program);
	} else if (!strcmp(what, "lsm")) {
		program = load(BPF_PROG_TYPE_LSM, BPF_LSM_MAC, function_id(where), 0);
		attached = attach_raw(NULL, program);
	} else if (!strcmp(what, "cgroup")) {
		program = load(BPF_PROG_TYPE_CGROUP_SKB, BPF_CGROUP_INET_EGRESS, 0, 1);
		attached = attach_cgroup(where, program);
	} else if (!strcmp(what, "xdp")) {
		program = load(BPF_PROG_TYPE_XDP, BPF_XDP, 0, XDP_PASS);
		attached = attach_xdp(where, program);
	} else {
		program = load(strncmp(what, "kprobes/", 8) ? BPF_PROG_TYPE_TRACEPOINT :
							     BPF_PROG_TYPE_KPROBE, 0, 0, 0);
		attached = attach_event(what, program);
	}
	if (program < 0)
		return 1;
	if (attached < 0) {
		perror("bpfprobe: attaching the program");
		return 1;
	}
	/* Nobody is to wait for the one that stays. */
	if (daemon(0, 0)) {
		perror("bpfprobe: daemon");
		return 1;
	}
	for (;;)
		pause();
}
