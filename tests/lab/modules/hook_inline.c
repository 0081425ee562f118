// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * A benign hook for the lab's guest: uname(2) begins with a jump to this module,
 * written over the place where Ftrace would call, and goes on behind it.
 */
#include <linux/ptrace.h>
#include <linux/string.h>

#include "hook.h"

#define JUMP_BYTES 5

static const u8 endbr[] = { 0xf3, 0x0f, 0x1e, 0xfa };
static long (*behind)(const struct pt_regs *regs);
static u8 *place;
static u8 straight[JUMP_BYTES];

static long passed_on(const struct pt_regs *regs)
{
	long result = behind(regs);

	hook_works();
	return result;
}

static int __init hook_init(void)
{
	u8 jump[JUMP_BYTES] = { 0xe9 };
	s32 offset;

	place = hook_find("__x64_sys_newuname");
	if (!place)
		return -ENOENT;
	if (!memcmp(place, endbr, sizeof(endbr)))
		place += sizeof(endbr);
	memcpy(straight, place, sizeof(straight));
	behind = (void *)(place + JUMP_BYTES);
	offset = (s32)((u8 *)passed_on - (place + JUMP_BYTES));
	memcpy(jump + 1, &offset, sizeof(offset));
	return hook_poke(place, jump, sizeof(jump));
}

static void __exit hook_exit(void)
{
	hook_poke(place, straight, sizeof(straight));
}

module_init(hook_init);
module_exit(hook_exit);
MODULE_DESCRIPTION("Lab: jump from the beginning of uname(2) into a module");
MODULE_LICENSE("GPL");
