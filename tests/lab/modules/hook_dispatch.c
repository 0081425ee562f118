// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * A benign hook for the lab's guest: getdents64 goes through this module, which
 * passes it on. The jump to it inside x64_sys_call() is bent, which is what
 * came after system call tables went out of use.
 */
#include <linux/kprobes.h>
#include <linux/memory.h>
#include <linux/module.h>
#include <linux/ptrace.h>
#include <linux/timekeeping.h>
#include <linux/uaccess.h>

/* x64_sys_call() is a switch over some 450 numbers. */
#define DISPATCHER_BYTES 16384

static long (*original)(const struct pt_regs *regs);
static void *(*poke)(void *at, const void *bytes, size_t length);
static struct mutex *poke_mutex;
static u8 *place;
static s32 straight;

static long passed_on(const struct pt_regs *regs)
{
	long result = original(regs);

	/* The harmless call that a hook's own work would make. */
	ktime_get_real_seconds();
	return result;
}

/* The address of a symbol that is not exported. */
static void *find(const char *name)
{
	struct kprobe probe = { .symbol_name = name };
	void *found;

	if (register_kprobe(&probe))
		return NULL;
	found = probe.addr;
	unregister_kprobe(&probe);
	return found;
}

static void write_target(s32 target)
{
	mutex_lock(poke_mutex);
	poke(place, &target, sizeof(target));
	mutex_unlock(poke_mutex);
}

static int __init hook_init(void)
{
	unsigned long (*lookup)(const char *name) = find("kallsyms_lookup_name");
	u8 *dispatcher;
	int at;

	if (!lookup)
		return -ENOENT;
	dispatcher = (u8 *)lookup("x64_sys_call");
	original = (void *)lookup("__x64_sys_getdents64");
	poke = (void *)lookup("text_poke");
	poke_mutex = (void *)lookup("text_mutex");
	if (!dispatcher)
		dispatcher = (u8 *)lookup("do_syscall_64");
	if (!dispatcher || !original || !poke || !poke_mutex)
		return -ENOENT;
	for (at = 0; at < DISPATCHER_BYTES; at++) {
		u8 bytes[5];
		s32 target;

		if (copy_from_kernel_nofault(bytes, dispatcher + at, sizeof(bytes)))
			break;
		memcpy(&target, bytes + 1, sizeof(target));
		/* call or jmp, with a 32-bit displacement from its end. */
		if ((bytes[0] & 0xfe) != 0xe8 ||
		    dispatcher + at + 5 + target != (u8 *)original)
			continue;
		place = dispatcher + at + 1;
		straight = target;
		write_target((s32)((u8 *)passed_on - (place + 4)));
		return 0;
	}
	return -ESRCH;
}

static void __exit hook_exit(void)
{
	write_target(straight);
}

module_init(hook_init);
module_exit(hook_exit);
MODULE_DESCRIPTION("Lab: pass getdents64 through a module inside the dispatcher");
MODULE_LICENSE("GPL");
