; NAME: says hello, and ends
;@ entry long64
;@ param count = 1     how often it says so
;
; Runs as it is: kvmmig run ./NAME.asm --set count=3. docs/guests.md of kvmmig tells what it finds, and may do.

    bits 64
    org 0x100000

SERIAL  equ 0x3f8               ; a byte written here is printed
EXIT    equ 0xf4                ; a byte written here ends the guest with that status
COUNT   equ 0x9f000             ; the first parameter; the next one is 8 bytes further on

start:                          ; rdi is this vCPU's index, and every vCPU starts here
    test rdi, rdi
    jnz idle
    mov rbx, [COUNT]
again:
    test rbx, rbx
    jz done
    mov rsi, message
    call print
    dec rbx
    jmp again
done:
    mov al, 0
    out EXIT, al
idle:
    pause
    jmp idle

; Print the text at rsi, which ends with a zero.
print:
    mov dx, SERIAL
.next:
    lodsb
    test al, al
    jz .done
    out dx, al
    jmp .next
.done:
    ret

message: db "Hello from NAME.", 10, 0
