// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * A benign hook for the lab's guest: a BPF program that asks the time whenever a
 * program is started (the tracepoint sched_process_exec), and does nothing else.
 * With the name of an event, perf has it run whenever that comes.
 * It stays for as long as a process does that this one leaves behind.
 *
 *	bpfprobe [sched/sched_process_exec | kprobes/NAME]
 *	killall bpfprobe
 */
#include <linux/bpf.h>
#include <linux/perf_event.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <unistd.h>

static int bpf(enum bpf_cmd command, union bpf_attr *attr)
{
	return syscall(SYS_bpf, command, attr, sizeof(*attr));
}

/* Has perf run the program at an event, on the first CPU. */
static int attach(const char *event, int program)
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

int main(int argc, char **argv)
{
	static const struct bpf_insn program[] = {
		{ .code = BPF_JMP | BPF_CALL, .imm = BPF_FUNC_ktime_get_ns },
		{ .code = BPF_ALU64 | BPF_MOV | BPF_K, .dst_reg = BPF_REG_0, .imm = 0 },
		{ .code = BPF_JMP | BPF_EXIT },
	};
	static char log[4096];
	union bpf_attr attr;
	int fd;

	memset(&attr, 0, sizeof(attr));
	attr.prog_type = BPF_PROG_TYPE_RAW_TRACEPOINT;
	if (argc > 1)
		attr.prog_type = strncmp(argv[1], "kprobes/", 8) ?
			BPF_PROG_TYPE_TRACEPOINT : BPF_PROG_TYPE_KPROBE;
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
		return 1;
	}

	memset(&attr, 0, sizeof(attr));
	attr.raw_tracepoint.name = (uintptr_t)"sched_process_exec";
	attr.raw_tracepoint.prog_fd = fd;
	if (argc > 1) {
		if (attach(argv[1], fd)) {
			perror("bpfprobe: the event");
			return 1;
		}
	} else if (bpf(BPF_RAW_TRACEPOINT_OPEN, &attr) < 0) {
		perror("bpfprobe: BPF_RAW_TRACEPOINT_OPEN");
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
